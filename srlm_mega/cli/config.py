"""`srlm config`: the resolved values of a configuration, and all its keys."""

import typer

from srlm_mega.cli.arguments import OVERRIDES, ConfigFile, Overrides

config_app = typer.Typer(
    help="Show a configuration's values, or all keys.", no_args_is_help=True, rich_markup_mode=None
)


@config_app.command("show", context_settings=OVERRIDES)
def config_show(config_file: ConfigFile, overrides: Overrides = None) -> None:
    """Show the resolved values, and where each came from."""
    from srlm_mega.config.file import leaves, load_config, origins

    values = leaves(load_config(config_file, overrides or []))
    where = origins(config_file, overrides or [])
    width = max(len(key) for key in values)
    for key, value in values.items():
        print(f"{key:<{width}} = {'null' if value is None else value!s:<32} # {where[key]}")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of configuration files."""
    import orjson

    from srlm_mega.config import Config

    print(orjson.dumps(Config.model_json_schema(), option=orjson.OPT_INDENT_2).decode())
