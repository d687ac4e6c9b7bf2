_base_ = ["./fcn_repvgg-a0_4xb2-80k_cityscapes-512x1024.py", "../_base_/repapq_w8a8.py"]
