"""Whether diffusers can build a scheduler from a config: it says what it does not take only when it is asked."""

from __future__ import annotations

import warnings

from sdopt.processes.channel import JsonTable


def find_scheduler_fault(config: JsonTable) -> JsonTable:
    """`fault` is why the class cannot be set up for one step with the config's values, or nothing."""
    import diffusers

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(diffusers, config["_class_name"]).from_config(config).set_timesteps(1)
    except ImportError:  # of a library that only some schedulers need, which is not the config's fault
        pass
    except Exception as error:  # a value of another type makes numpy and torch raise nearly anything
        return {"fault": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    return {"fault": ""}
