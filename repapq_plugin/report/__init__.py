"""What a person reads about a quantization: tables for a terminal, and pages for a browser.

A page is a `Page` of `Section`s; `write_page` makes one HTML file of it.
"""

from repapq_plugin.report.calibration import Evidence as Evidence
from repapq_plugin.report.calibration import calibration_page as calibration_page
from repapq_plugin.report.calibration import write_report as write_report
from repapq_plugin.report.diagnosis import diagnosis_page as diagnosis_page
from repapq_plugin.report.diagnosis import difference_section as difference_section
from repapq_plugin.report.diagnosis import write_diagnosis as write_diagnosis
from repapq_plugin.report.html import render as render
from repapq_plugin.report.html import require_report as require_report
from repapq_plugin.report.html import write_page as write_page
from repapq_plugin.report.page import Figure as Figure
from repapq_plugin.report.page import Headline as Headline
from repapq_plugin.report.page import Line as Line
from repapq_plugin.report.page import Page as Page
from repapq_plugin.report.page import Section as Section
from repapq_plugin.report.page import Table as Table
