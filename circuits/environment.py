"""The environment variables that the package reads."""

WORKSPACE = "CIRCUITS_WORKSPACE"
"""The folder of the workspace, where no argument names one."""

ASSETS = "CIRCUITS_ASSETS"
"""A folder with `weights/` and `images/` of real models."""

TRUST_PYTHON = "CIRCUITS_TRUST_PYTHON"
"""Set if the app may run the code of models that a workspace names `python:…`."""

PROGRESS = "CIRCUITS_PROGRESS"
"""The file in which a job notes how far it is."""

DEBUG = "CIRCUITS_DEBUG"
"""Set if errors at the command line keep their traceback."""
