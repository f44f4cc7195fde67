"""The routing of a text: the analysis of Mixtral of Experts (Jiang et al. 2024, arXiv 2401.04088, section 5) and more,
behind `qmix stats -f`. No torch.

measures.py has a small class for each figure, and chance.py what a router that chooses at random would give.
recorder.py feeds them pass by pass and keeps counts only. report.py makes the document, view.py the coloured text,
plots.py the pictures, and folder.py writes them. texts.py runs a model over texts.
"""
