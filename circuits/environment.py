"""The environment variables that the package reads."""

WORKSPACE = "CIRCUITS_WORKSPACE"
"""The folder of the workspace, where no argument names one."""

ASSETS = "CIRCUITS_ASSETS"
"""A folder with `weights/` and `images/` of real models."""

TRUST_PYTHON = "CIRCUITS_TRUST_PYTHON"
"""Set to 1 if code may run that a file names (models and data called `python:…` by a workspace or an autoencoder)."""

PROGRESS = "CIRCUITS_PROGRESS"
"""The file in which a job notes how far it is."""

TAKE_OVER = "CIRCUITS_TAKE_OVER"
"""The name of a machine whose processes have all ended: locks that they left are taken over. It is needed where the
file system has no locks of the kernel, and a process was killed on a machine that cannot be asked."""

DEBUG = "CIRCUITS_DEBUG"
"""Set if errors at the command line keep their traceback."""
