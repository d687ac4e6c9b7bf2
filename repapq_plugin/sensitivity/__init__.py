"""Mixed precision: what each unit costs at each bit width, and which bits fit a budget with the least damage."""

from repapq_plugin.sensitivity.assign import Budget as Budget
from repapq_plugin.sensitivity.assign import choose_bits as choose_bits
from repapq_plugin.sensitivity.measure import measure_sensitivity as measure_sensitivity
from repapq_plugin.sensitivity.table import Assignment as Assignment
from repapq_plugin.sensitivity.table import Sensitivity as Sensitivity
