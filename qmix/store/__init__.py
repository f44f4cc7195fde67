"""The store: a folder of plain safetensors files and a manifest, with each expert as one record.

layout says where every byte lies, manifest what qmix.json holds; writer fills a folder, reader opens and
checks one, summary and calibrated describe it.
"""

from qmix.store.calibrated import expert_rows, fell_back, layer_rows
from qmix.store.layout import CONFIG, JOURNAL, MANIFEST, Region, StoreLayout, record_name
from qmix.store.manifest import Calibrated, CalibrationEntry, DenseEntry, FileEntry, Manifest, RecordEntry
from qmix.store.reader import Store
from qmix.store.records import VERIFY, RecordFiles, Verify
from qmix.store.summary import ClassSummary, classes, describe, worst_experts
from qmix.store.writer import StoreWriter

__all__ = ["CONFIG", "JOURNAL", "MANIFEST", "VERIFY", "Calibrated", "CalibrationEntry", "ClassSummary", "DenseEntry",
           "FileEntry", "Manifest", "RecordEntry", "RecordFiles", "Region", "Store", "StoreLayout", "StoreWriter",
           "Verify", "classes", "describe", "expert_rows", "fell_back", "layer_rows", "record_name", "worst_experts"]
