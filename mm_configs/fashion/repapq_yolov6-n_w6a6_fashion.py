_base_ = ["./yolov6-n_fashion.py", "../_base_/repapq_w6a6.py"]

load_from = "{{ fileDirname }}/../../integration/assets/yolov6-n_fashion.pth"
