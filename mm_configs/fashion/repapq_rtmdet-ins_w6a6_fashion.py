_base_ = ["./rtmdet-ins_fashion.py", "../_base_/repapq_w6a6.py"]

load_from = "{{ fileDirname }}/../../integration/assets/rtmdet-ins_fashion.pth"
