"""Reading files of other people that torch wrote, without running anything that stands in them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from os import PathLike
from typing import IO

from torch.serialization import MAP_LOCATION, add_safe_globals, clear_safe_globals, get_safe_globals
from torch.serialization import load as torch_load  # bound here, because a host may put this module's in its place

from repapq_plugin.errors import HostError

File = str | PathLike[str] | IO[bytes]
"""What torch reads from."""

StandIns = Mapping[str, Callable[..., object]]
"""What is taken, by the full name that stands in a file, where that file asks for something torch does not know."""

NAMED = (re.compile(r"GLOBAL (\S+) was not an allowed global"), re.compile(r"unsupported GLOBAL (\S+) whose module"))
"""How torch says what it refused."""

LONGEST = 300
"""Characters of a reason that an error quotes."""


class Refused(Exception):
    """A stand-in was asked for something that it does not do.

    Args:
        what: Name of it.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


def load_plain(
    file: File, named: str, remedy: str, stand_ins: StandIns | None = None, map_location: MAP_LOCATION = "cpu"
) -> object:
    """Read a file of `torch.save` that holds tensors and plain values only.

    Nothing that other code of the process declared safe is called: only what torch itself knows, and the stand-ins.

    Args:
        file: Path, or an open binary file.
        named: What to call the file in errors, at the start of a sentence.
        remedy: What to do where the file is refused, as a sentence.
        stand_ins: Are called, with whatever the file says, in the place of what they are named after.
        map_location: As `torch.load` takes it.

    Raises:
        FileNotFoundError: There is no such file.
        HostError: It asks for anything else, which is named; or it is damaged.
    """
    ours = [*((stand_in, name) for name, stand_in in (stand_ins or {}).items())]
    before = get_safe_globals()
    clear_safe_globals()
    add_safe_globals([*ours])
    try:
        return torch_load(file, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except Refused as error:
        raise HostError(_refusal(named, error.what, remedy)) from error
    except Exception as error:  # A file can say anything, and stand-ins are called with it.
        refused = _name_in(error)
        if refused is not None:
            raise HostError(_refusal(named, refused, remedy)) from None
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise HostError(f"{named} cannot be read as plain data ({_reason(error)}). {remedy}") from error
        raise HostError(f"{named} cannot be read: {_reason(error)}") from error
    finally:
        # A part of torch that was first imported meanwhile may have declared something as well.
        since = [each for each in get_safe_globals() if each not in ours]
        clear_safe_globals()
        add_safe_globals([*before, *since])


def _refusal(named: str, what: str, remedy: str) -> str:
    return f"{named} holds {what}, which is no plain data; reading it could run code of whoever made the file. {remedy}"


def _name_in(error: Exception) -> str | None:
    found = next(filter(None, (pattern.search(str(error)) for pattern in NAMED)), None)
    return found[1] if found and isinstance(error, pickle.UnpicklingError) else None


def _reason(error: Exception) -> str:
    """Return what is wrong with a file, without torch's own advice, which says how to run its code."""
    said = str(error).partition("\n\nCheck the documentation")[0].rpartition("WeightsUnpickler error:")[2]
    lines = [line for line in said.strip().splitlines() if line.strip()] or [type(error).__name__]
    text = lines[0].partition(" In PyTorch 2.6, we changed")[0]
    kind = "" if isinstance(error, OSError | RuntimeError | pickle.UnpicklingError) else f"{type(error).__name__}: "
    return (kind + text)[:LONGEST]
