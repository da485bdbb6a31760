"""HTML pages, each one self-contained file: to be looked at rather than read."""

from retrieval.report.evaluation import evaluation_page, write_evaluation_page
from retrieval.report.run import run_page, write_run_page
from retrieval.report.search import results_page, write_results_page

__all__ = [
    "evaluation_page",
    "results_page",
    "run_page",
    "write_evaluation_page",
    "write_results_page",
    "write_run_page",
]
