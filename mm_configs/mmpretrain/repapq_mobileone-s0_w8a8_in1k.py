_base_ = ["mmpretrain::mobileone/mobileone-s0_8xb32_in1k.py", "../_base_/repapq_w8a8.py"]
