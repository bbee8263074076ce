"""The work of each stage: one folder a stage, of modules that know no orchestrator."""
