"""What this machine is to a stored profile: the environment that the profile's backend and kernel have here."""

from __future__ import annotations

from functools import cache

from moetune.backends import registry
from moetune.errors import MoetuneError
from moetune.measure.probe import device_for, environment
from moetune.spec.environment import Environment
from moetune.store.profile import Profile


def environment_here(profile: Profile, device: str | None = None) -> Environment | str:
    """Returns the environment that a profile's backend has on this machine, or why it is not known.

    Only what the machine decides can be compared: the options that a profile was measured with are in
    `store.versions.KERNEL_FIELDS`.

    Args:
        profile: the profile.
        device: a torch device; by default `cuda` if there is one, else `cpu`.
    """
    kernel = profile.environment.strict.get("kernel")
    return _environment(profile.backend, kernel if profile.backend == "triton" else None, device)


@cache
def _environment(name: str, kernel: str | None, device: str | None) -> Environment | str:
    try:
        backend = registry.backend(name, **({} if kernel is None else {"kernel": kernel}))
        return environment(backend, device_for(device))
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed here"
    except MoetuneError as error:
        return error.message.rstrip(".")
    except (ImportError, OSError) as error:
        return f"{name} cannot be imported here: {error}"
