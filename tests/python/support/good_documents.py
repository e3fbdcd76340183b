"""Content of plans, descriptions of matrices, analyses and records, for tests that spoil it."""

GRID = {
    "shape": [48, 32],
    "bits": 3,
    "group_size": 16,
    "sym": False,
    "dtype": "float32",
    "scale": "float16",
    "zero": {
        "shape": [96],
        "bits": 8,
        "group_size": 64,
        "sym": True,
        "dtype": "float32",
        "scale": "float16",
        "zero": None,
    },
}
MATRIX = {"kind": "grid", **GRID, "outliers": 4, "digest": "0" * 16}
CODEBOOK = {
    "kind": "codebook",
    "shape": [48, 32],
    "bits": 3,
    "group_size": 16,
    "dtype": "float16",
    "codebook": "rows",
    "table": "float16",
    "scale": GRID["zero"],
}
TRELLIS = {"kind": "trellis", "shape": [48, 32], "bits": 2, "state_bits": 12, "code": "hyb", "dtype": "float32"}
PLAN = {
    "format": "quantrature-plan",
    "format_version": 2,
    "allocation": {"strategy": "pqi"},
    "entries": {
        "a": {"bits": 3, "group_size": 64, "sym": False, "method": "hqq", "meta_bits": 8, "outlier_fraction": 0.005},
        "b": {"bits": 16, "reason": "as it is", "predicted_loss_change": None},
    },
}
RECORD = {
    "format": "quantrature-requant",
    "format_version": 1,
    "modules": [{"name": "a", "weights": 100, "outliers": 3, "significant": 1, "mean_pqi": 0.1}],
    "stages": [{"name": "host", "kept": 4, "measured_loss_change": 0.1}],
    "trials": [{"temperature": 0.5, "measured_loss_change": 0.2}],
    "temperature": 0.5,
    "bytes": 100,
    "grid_bytes": 90,
    "settings": {},
    "model": "0",
    "calibration": "1",
}
SENSITIVITY = {
    "format": "quantrature-sensitivity",
    "format_version": 1,
    "model": "0",
    "calibration": "1",
    "settings": {"objective": "nll"},
    "proofs": [
        {
            "setting": "b3g64",
            "method": "rtn",
            "rule": "gauss",
            "nodes": 4,
            "predicted_loss_change": 0.1,
            "measured_loss_change": 0.2,
            "gradient_evaluations": 4,
        }
    ],
    "modules": [
        {
            "name": "a",
            "role": "a",
            "block": 0,
            "out_features": 48,
            "in_features": 32,
            "scores": {"pqi": 0.1},
            "loss_change": {"b3g64": 0.1},
        }
    ],
}
