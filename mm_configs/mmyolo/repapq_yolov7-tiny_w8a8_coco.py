_base_ = ["mmyolo::yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco.py", "../_base_/repapq_w8a8.py"]
