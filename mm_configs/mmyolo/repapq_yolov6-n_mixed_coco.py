_base_ = ["mmyolo::yolov6/yolov6_n_syncbn_fast_8xb32-400e_coco.py", "../_base_/repapq_mixed.py"]
