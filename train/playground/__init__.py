"""A local web page on which to try a trained adapter and change it: python -m train.playground RUN."""
