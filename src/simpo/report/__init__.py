"""The report of a run, of several runs, or of rounds: one HTML page that needs nothing else, and charts to paste.

Reads only what lies in the folders of runs; must not import torch, the trainer or what runs models.
"""

from simpo.report.write import leave_report, report_path, try_report, watch_runs, write_report

__all__ = ["leave_report", "report_path", "try_report", "watch_runs", "write_report"]
