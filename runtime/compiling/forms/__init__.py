"""The optimised forms of a tensor program: which there are, making one, loading one.

Which of them to serve is the build's to measure and prove; this knows neither.
"""

from runtime.compiling.forms.environment import environment
from runtime.compiling.forms.form import Form, FormFailure, Run
from runtime.compiling.forms.table import FORMS, forms_for, load_form, make_form, unavailable

__all__ = [
    "FORMS",
    "Form",
    "FormFailure",
    "Run",
    "environment",
    "forms_for",
    "load_form",
    "make_form",
    "unavailable",
]
