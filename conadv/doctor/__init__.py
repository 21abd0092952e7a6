"""``conadv doctor``: what there is (``facts``), what of it would be slow or wrong (``findings``), and both shown."""
