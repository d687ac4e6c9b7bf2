_base_ = ["./repvgg_fashion.py", "../_base_/repapq_w6a6.py"]

load_from = "{{ fileDirname }}/../../integration/assets/repvgg_fashion.pth"
