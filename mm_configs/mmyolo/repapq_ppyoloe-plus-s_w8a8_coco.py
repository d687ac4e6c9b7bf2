_base_ = ["mmyolo::ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py", "../_base_/repapq_w8a8.py"]

# The base starts a training from weights of another data set; what is quantized has to be named.
load_from = None
