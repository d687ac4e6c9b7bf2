_base_ = ["./repvgg_fashion.py", "../_base_/repapq_w4a4.py"]

load_from = "{{ fileDirname }}/../../integration/assets/repvgg_fashion.pth"
