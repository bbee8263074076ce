"""How each stage does its work: one folder a stage, of modules that know no orchestrator."""
