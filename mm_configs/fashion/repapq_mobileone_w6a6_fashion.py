_base_ = ["./mobileone_fashion.py", "../_base_/repapq_w6a6.py"]

load_from = "{{ fileDirname }}/../../integration/assets/mobileone_fashion.pth"
