"""Several runs on the same images: averaged into one, or compared, with what each cost."""
