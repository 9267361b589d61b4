"""The pipeline, one file a stage, each read top to bottom: sft, aif, reference, dpo, export."""
