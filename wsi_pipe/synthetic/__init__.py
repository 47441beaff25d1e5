"""H&E-like slides with known tissue, known lesions and known labels: for tests, the demo and the benchmark."""

from wsi_pipe.synthetic.cohort import LABELS, CohortSlide, make_cohort, plan_cohort
from wsi_pipe.synthetic.slide import LevelView, SyntheticSlide, Truth
from wsi_pipe.synthetic.spec import SIGNALS, Signal, SlideSpec

__all__ = [
    "LABELS",
    "SIGNALS",
    "CohortSlide",
    "LevelView",
    "Signal",
    "SlideSpec",
    "SyntheticSlide",
    "Truth",
    "make_cohort",
    "plan_cohort",
]
