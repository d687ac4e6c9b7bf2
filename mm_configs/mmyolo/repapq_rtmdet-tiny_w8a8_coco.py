_base_ = ["mmyolo::rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py", "../_base_/repapq_w8a8.py"]
