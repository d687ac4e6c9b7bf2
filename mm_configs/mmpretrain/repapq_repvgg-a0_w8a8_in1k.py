_base_ = ["mmpretrain::repvgg/repvgg-A0_8xb32_in1k.py", "../_base_/repapq_w8a8.py"]
