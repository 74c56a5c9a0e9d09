"""AdamW to Muon: convert an optimizer, and go on training."""
