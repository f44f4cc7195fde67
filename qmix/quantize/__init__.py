"""From a checkpoint to a store: methods choose the codes, job streams the experts through them."""
