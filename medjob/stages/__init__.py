"""One file a stage: `run(context) -> metrics`."""
