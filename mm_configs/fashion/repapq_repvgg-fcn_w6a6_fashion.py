_base_ = ["./repvgg-fcn_fashion.py", "../_base_/repapq_w6a6.py"]

load_from = "{{ fileDirname }}/../../integration/assets/repvgg-fcn_fashion.pth"
