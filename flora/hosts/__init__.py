"""Where adapters run: each host maps its own layers and batches to `flora.ops`."""
