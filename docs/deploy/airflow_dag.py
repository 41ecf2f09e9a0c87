"""fhirlake every hour, with the recipe's retries, and a mail when all is done.

FHIRLAKE names the program and FHIRLAKE_PIPELINE the pipeline file where they are not the usual ones. Exit code 12, the server asks
to come back later, skips the task; all others but 0 fail it, and Airflow tries again.
"""

import os
from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

FHIRLAKE = os.environ.get("FHIRLAKE", "/usr/local/bin/fhirlake")
PIPELINE = os.environ.get("FHIRLAKE_PIPELINE", "/etc/fhirlake/pipeline.yaml")

with DAG(
    "fhirlake",
    description="Keeps Delta tables in step with a FHIR server",
    schedule="15 * * * *",
    start_date=datetime(2025, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=5)},
    tags=["fhir", "delta"],
) as dag:
    sync = BashOperator(
        task_id="sync",
        bash_command='"$FHIRLAKE" run "$PIPELINE"',
        env={"FHIRLAKE": FHIRLAKE, "PIPELINE": PIPELINE},
        append_env=True,
        skip_on_exit_code=[12],
    )
    notify = BashOperator(
        task_id="notify",
        # The recipe mails; put your own command here. It is reached only when the run succeeded.
        bash_command='echo "the FHIR tables are in step: {{ ts }}"',
    )
    sync >> notify
