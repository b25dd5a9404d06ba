"""Reports as one HTML file that needs no network: of a network, and of a finished experiment.

`jaxinv report MODULE:NAME` and `jaxinv report RESULTS` write them. The numbers of a page are in it
as JSON; a script in the page draws every table, chart and picture from that.
"""

from jaxinv.pages.experiment import experiment_page
from jaxinv.pages.html import render
from jaxinv.pages.model import describe, model_page

__all__ = ["describe", "experiment_page", "model_page", "render"]
