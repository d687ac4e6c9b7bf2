import math

import numpy as np

from repapq_plugin.hosts.openmmlab.record import Record


def test_scores_of_any_number_type_are_kept() -> None:
    record = Record(config="", checkpoint="", scheme="", settings={})
    record.add_scores("float", {"mIoU": np.float32(53.5), "count": np.int64(3), "aAcc": math.nan, "note": "said"})
    assert record.scores["float"] == {"mIoU": 53.5, "count": 3.0, "aAcc": None}
