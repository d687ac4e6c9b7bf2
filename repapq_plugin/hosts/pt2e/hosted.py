"""pt2e behind the call that every host has: calibrate a network of images, and run it as a converted graph."""

from __future__ import annotations

from repapq_plugin.hosts.hosted import quantizing_on
from repapq_plugin.hosts.pt2e.backend import Pt2eBackend

quantize_network = quantizing_on(Pt2eBackend)
"""Calibrate a network and convert it with pt2e, which takes no options (see `repapq_plugin.hosts.hosted.Quantize`)."""
