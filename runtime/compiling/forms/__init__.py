"""The optimised forms of a tensor program: which there are, making one, loading one.

Which of them to serve is the build's to measure and prove; this knows neither.
"""

from runtime.compiling.forms.environment import environment
from runtime.compiling.forms.form import Form, FormFailure, Run
from runtime.compiling.forms.table import (
    FORMS,
    form_directory,
    forms_for,
    load_form,
    make_form,
    unavailable,
)
from runtime.compiling.forms.witness import check_witness

__all__ = [
    "FORMS",
    "Form",
    "FormFailure",
    "Run",
    "check_witness",
    "environment",
    "form_directory",
    "forms_for",
    "load_form",
    "make_form",
    "unavailable",
]
