_base_ = ["./faster-rcnn_repvgg-a0_fpn_1x_coco.py", "../_base_/repapq_w8a8.py"]
