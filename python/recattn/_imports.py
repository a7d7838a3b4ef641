"""One ImportError for all optional libraries: it names what is missing, and the extra that installs it."""

import contextlib
from collections.abc import Iterator
from importlib import metadata


@contextlib.contextmanager
def importing(library: str, *, module: str, extra: str, user: str | None = None) -> Iterator[None]:
    """Say what an import needs if it fails:

        with importing("RecBole", module="recbole", extra="recbole"):
            from recbole.model.layers import MultiHeadAttention

    Args:
        library: its name in the message.
        module: its top-level module.
        extra: the extra of recattn that installs it and all that importing it takes.
        user: who needs it, in the message: by default recattn.integrations.MODULE.

    Raises:
        ImportError: the library is not installed; or it is, and a module that it imports is missing or does not fit it.
    """
    try:
        yield
    except (ImportError, AttributeError, OSError) as error:  # numpy 2 has no np.float_; a library of another torch
        command = f'pip install "recattn[{extra}]"'
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            message = f"{user or f'recattn.integrations.{module}'} needs {library}, which is not installed: {command}"
        elif isinstance(error, ModuleNotFoundError):
            message = f"{_installed(library, module)}, but importing it needs {error.name}, which is missing: {command}"
        else:
            message = f"{_installed(library, module)}, but importing it failed ({error}): {command}"
        raise ImportError(message, name=getattr(error, "name", None)) from error


def _installed(library: str, module: str) -> str:
    try:
        return f"{library} {metadata.version(module)} is installed"
    except metadata.PackageNotFoundError:  # a source folder on the path
        return f"{library} is installed"
