"""What pyproject.toml cannot say: ds_configs/ at the top is installed as a folder of igpt_ds."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["igpt_ds*", "data_prep*"]), "igpt_ds.ds_configs"],
    package_dir={"igpt_ds.ds_configs": "ds_configs"},
    package_data={
        "igpt_ds": ["py.typed"],
        "igpt_ds.config": ["presets/*.toml"],
        "igpt_ds.ds_configs": ["*.json"],
        "data_prep": ["py.typed"],
    },
)
