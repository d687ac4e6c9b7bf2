_base_ = ["./fcn_mobileone-s0_4xb4-160k_ade20k-512x512.py", "../_base_/repapq_w8a8.py"]
