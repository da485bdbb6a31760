"""HTML pages, each one self-contained file: to be looked at rather than read."""

from retrieval.report.captions import captions_page, write_captions_page
from retrieval.report.duplicates import duplicates_page, write_duplicates_page
from retrieval.report.evaluation import evaluation_page, write_evaluation_page
from retrieval.report.run import run_page, write_run_page
from retrieval.report.search import results_page, write_results_page

__all__ = [
    "captions_page",
    "duplicates_page",
    "evaluation_page",
    "results_page",
    "run_page",
    "write_captions_page",
    "write_duplicates_page",
    "write_evaluation_page",
    "write_results_page",
    "write_run_page",
]
