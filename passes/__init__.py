"""Graph rewrites on ExportedProgram: one file each, one ordered PIPELINE, verified after every step."""
