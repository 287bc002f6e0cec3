"""The page of a run: one HTML file that needs nothing outside it, on a screen or on paper.

    from pyrolvm.report import write_report
    write_report("runs/iris")

The page shows what the run folder and `diagnose` say, in tables and figures; no number is made for it but
means, standard errors and quantiles of their columns.
"""

from pyrolvm.report.writing import REPORT, write_report

__all__ = ["REPORT", "write_report"]
