"""`python -m launch verify`: is a model right on N replicas?"""

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
        command_line: what was asked for.
        model: the model that it comes down to, a name or a path.

    Returns:
        Whether the model is right.

    Raises:
        UsageError: something given is wrong; nothing was compared.
    """
    with input_errors.as_usage_errors():
        config, reference = setup.resolve(command_line, model)
        arguments = {"replicas": DEFAULT_REPLICAS, **command_line.verify}
        # Before data are loaded: devices are made before TensorFlow's first use.
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
