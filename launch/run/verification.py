"""`python -m launch verify`: compares a model on N replicas with one device."""

import pathlib

import distfit
from distfit import verification
from launch.errors import UsageError
from launch.run import input_errors, setup
from launch.settings.flags import CommandLine

DEFAULT_REPLICAS = (1, 2, 4)


def run(command_line: CommandLine, model: str) -> bool:
    """Verifies a model, prints the report and writes it to the working folder.

    Args:
        command_line: the parsed command line.
        model: the resolved model, a name or a path.

    Returns:
        Whether the model passed.

    Raises:
        UsageError: the input is invalid; nothing was compared.
    """
    with input_errors.as_usage_errors():
        config, reference = setup.resolve(command_line, model)
        arguments = {"replicas": DEFAULT_REPLICAS, **command_line.verify}
        # Before the data: devices must be created before TensorFlow is used.
        verification.devices_for(max(arguments["replicas"]))
        setup.set_dtype_policy(config)
        train, _ = setup.load_data(config, reference)
        report = distfit.verify(
            lambda: setup.build_model(config, reference),
            train,
            batch_size=config.batch_size,
            **arguments,
        )
    print(report)
    folder = pathlib.Path(config.workdir)
    try:
        report.save(folder)
    except OSError as error:
        raise UsageError(
            f"The working folder cannot be written to ({error.strerror}). "
            f"Received: --workdir={folder}. Give another folder."
        ) from error
    print(f"report: {folder / 'report.html'} and report.json")
    return report.ok
