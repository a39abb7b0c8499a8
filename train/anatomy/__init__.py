"""What a trained run learnt, as numbers, figures and a page: python -m train.anatomy RUN."""
