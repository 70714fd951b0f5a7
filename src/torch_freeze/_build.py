"""What the compiled module was built for, and loading it only if it fits.

No other module imports ``_C``. If the package has no compiled module, as after
``TORCH_FREEZE_NO_EXTENSION=1 pip install .``, `_without_extension` replaces it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

__version__ = "0.1.0"

_PACKAGE = Path(__file__).resolve().parent
_MODULE = f"{__package__}._C"


@dataclasses.dataclass(frozen=True)
class BuildInfo:
    """What the compiled module was built for.

    Attributes:
        version: version of torch_freeze.
        torch: version of the torch it was compiled against, the only one it works with; without
            a compiled module, the version of the installed torch.
        cuda: CUDA version of that torch; None if the module has no CUDA code.
        architectures: GPU code in the module: ``sm_90`` runs on compute capability 9.x;
            ``compute_90`` is PTX, which is compiled at its first use on 9.0 or later. Empty
            without CUDA.
        compiler: first line of the C++ compiler's ``--version``; "" without a compiled module.
        debug: whether it was built with ``DEBUG=1``, without optimization and with debug symbols.
        cpu_only_because: why there is no CUDA code; None if there is.
        compiled: False if torch_freeze was installed without its compiled module, so that
            the optimizers use torch's own operators.
    """

    version: str
    torch: str
    cuda: str | None
    architectures: tuple[str, ...]
    compiler: str
    debug: bool
    cpu_only_because: str | None
    compiled: bool = True

    def __str__(self) -> str:
        """One line for a bug report."""
        if not self.compiled:
            return f"torch_freeze {self.version}, torch {self.torch}, no compiled module"
        cuda = f"CUDA {self.cuda} for {' '.join(self.architectures)}"
        device = cuda if self.cuda else f"CPU only ({self.cpu_only_because})"
        debug = ", debug build" if self.debug else ""
        return f"torch_freeze {self.version}, torch {self.torch}, {device}, {self.compiler}{debug}"


def build_info() -> BuildInfo:
    """Return what the compiled module was built for.

    Returns:
        The versions of torch_freeze, torch and CUDA, the GPU architectures and the compiler.

    Raises:
        ImportError: the modules in the package were built for another Python, or their record is
            damaged. The message has the command that rebuilds them.

    Example:
        >>> import torch, torch_freeze
        >>> info = torch_freeze.build_info()
        >>> info.torch == torch.__version__
        True
        >>> print(info)  # doctest: +ELLIPSIS
        torch_freeze ..., torch ..., ...
    """
    if not _was_compiled():
        import torch

        return BuildInfo(
            version=__version__,
            torch=torch.__version__,
            cuda=None,
            architectures=(),
            compiler="",
            debug=False,
            cpu_only_because="there is no compiled module",
            compiled=False,
        )
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.origin is None:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ImportError(
            f"torch_freeze in {_PACKAGE} has no compiled module for Python {python}. {_command()}"
        )
    record = Path(spec.origin).with_suffix(".json")
    try:
        fields = json.loads(record.read_text())
        fields["architectures"] = tuple(fields["architectures"])
        return BuildInfo(version=__version__, **fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImportError(
            f"torch_freeze cannot tell what {spec.origin} was built for ({record.name}: {error}). "
            f"{_command()}"
        ) from error


def load_extension() -> ModuleType:
    """Load ``torch_freeze._C`` if it was built for the installed torch.

    torch's C++ symbols differ between versions and between its CPU and CUDA builds. A module built
    for another torch is refused here, before the loader finds an undefined symbol.

    Returns:
        The compiled module, or `_without_extension` if the package has none.

    Raises:
        ImportError: the module was built for another torch or another Python (the message names
            both and has the command that rebuilds it), or Python runs without its global lock.
    """
    if not _was_compiled():
        return importlib.import_module(f"{__package__}._without_extension")
    import torch

    info = build_info()
    if info.torch != torch.__version__ or info.cuda not in (None, torch.version.cuda):
        built = f"torch {info.torch} ({f'CUDA {info.cuda}' if info.cuda else 'CPU code only'})"
        here = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
        raise ImportError(f"torch_freeze was built for {built}, but this is {here}. {_command()}")
    try:
        module = importlib.import_module(_MODULE)
    except ImportError as error:
        raise ImportError(
            f"torch_freeze was built for this torch {torch.__version__}, but its module does not "
            f"load ({error}). {_command()}"
        ) from error
    # A free-threaded Python enables its lock when it loads a module that does not opt out.
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise ImportError(
            "torch_freeze reads Python's lists and dicts under the global interpreter lock, and "
            "free-threaded Python runs without it. Leave PYTHON_GIL and -X gil unset, or set them "
            "to 1"
        )
    return module


def without_extension() -> str:
    """A message for a package without a compiled module, with the command that builds it."""
    return f"torch_freeze in {_PACKAGE} has no compiled module. {_command()}"


def _was_compiled() -> bool:
    """Whether the package contains a compiled module, or the record of one, for any Python."""
    return any(path.suffix != ".pyi" for path in _PACKAGE.glob("_C.*"))


def require_torch() -> None:
    """Raise ImportError if torch is not installed; the message has the command."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"torch_freeze needs torch, which {sys.prefix} does not have. Run\n"
            f"    {sys.executable} -m pip install torch\nand then build torch_freeze. {_command()}"
        ) from error


def refuse_subinterpreter() -> None:
    """Raise ImportError in a subinterpreter, where importing torch hangs or crashes."""
    for name in ("_interpreters", "_xxsubinterpreters"):  # Python 3.13 renamed it
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        if interpreters.get_current() != interpreters.get_main():
            raise ImportError(
                "torch_freeze, like torch, works in the main interpreter only. Use a thread or a "
                "process (torch.multiprocessing) instead of a subinterpreter"
            )
        return


def _command() -> str:
    """The command that builds the module, for a source tree or an installation."""
    source = _PACKAGE.parent.parent
    pip = f"{sys.executable} -m pip install --no-build-isolation"
    if (source / "setup.py").is_file() and (source / "csrc").is_dir():
        return f"Build it with\n    {pip} -e {source}"
    pip += " --force-reinstall --no-deps"
    return f"Build it, in the folder of torch_freeze's source, with\n    {pip} ."


# These run on import, because the package imports torch next.
refuse_subinterpreter()
require_torch()
