"""What routers do with a text: the analysis of Mixtral of Experts (Jiang et al. 2024, arXiv 2401.04088, section 5) and
more, behind `qmix stats -f`. No torch.

measures.py has a small class for each figure, chance.py what an aimless router would give, recorder.py feeds them pass
by pass and keeps counts only, report.py makes the document, view.py the coloured text, plots.py the pictures, folder.py
writes them, texts.py runs a model over texts.
"""
